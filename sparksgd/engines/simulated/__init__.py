"""The simulated engine: real gradients in virtual time.

costs.py       how long computing, links and jobs take, from the section [cluster]
arrivals.py    shards at their own pace, in virtual time
rounds.py      rounds of all shards, or of the first ones, in virtual time
gossip.py      shards that wait for their peers, in virtual time
engine.py      the engine
"""
