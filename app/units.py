"""How bytes, memory and times are written wherever a person reads them."""


def size(num_bytes: float) -> str:
    """In the largest unit that keeps a digit before the point; steps of 1000."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def memory(megabytes: float) -> str:
    """Megabytes as the workers measure them."""
    if megabytes >= 1:
        return size(megabytes * 1e6)
    return f"{megabytes:.1f} MB" if megabytes >= 0.05 else "0 MB"


def duration(seconds: float) -> str:
    """3 min 20 s; the two largest units that matter."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
