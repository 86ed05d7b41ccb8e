"""The engines that run on Spark."""
