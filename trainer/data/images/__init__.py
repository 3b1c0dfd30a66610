"""Picture shards (tar): from a list of URLs to a clean index."""
