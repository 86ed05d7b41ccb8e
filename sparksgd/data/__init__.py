"""From rows to shards: schema, shard files, sampling."""
