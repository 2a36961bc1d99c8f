"""Several processes as one: how they start, agree, write once, and end together."""
