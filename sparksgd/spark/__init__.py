"""The Spark side: sessions, slots, DataFrames dealt into shards.  The only room that imports pyspark,
with the engines that run on it."""
