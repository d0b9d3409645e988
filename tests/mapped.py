"""Says whether jemalloc is in this process, and how it is set."""

import os

if __name__ == "__main__":
    with open("/proc/self/maps") as maps:
        print("libjemalloc" in maps.read(), os.environ.get("MALLOC_CONF"))
