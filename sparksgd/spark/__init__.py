"""Everything on Spark: sessions, slots, rows of DataFrames, engines.  Only this room imports pyspark."""
