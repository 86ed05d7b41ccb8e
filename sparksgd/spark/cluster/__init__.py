"""The cluster of a run: slots, placement, Spark jobs, lost executors, shards."""
