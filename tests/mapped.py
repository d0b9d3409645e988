"""Says whether jemalloc is in this process."""

if __name__ == "__main__":
    with open("/proc/self/maps") as maps:
        print("libjemalloc" in maps.read())
