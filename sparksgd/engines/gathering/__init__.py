"""The decisions of an engine: whom to ask, who is lost, when enough have arrived.

Each gathering is a state machine:  `handle(event)` changes it, and returns instructions for the engine.  It
has no clock, I/O, thread or Spark.  So real tasks and simulated ones can drive the same machine, and tests
need neither.  It records in a trace what chance decided.

    rounds.py      a step uses the first shards of a quorum that arrive
    arrivals.py    each message goes to the centre, which releases shards or holds them back
    gossip.py      a shard goes on when the messages of its peers are there
"""
