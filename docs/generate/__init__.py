"""What `make docs` generates: pages of methods and reference, pictures, and checked links."""
