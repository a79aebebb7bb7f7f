"""Plans a deployment before it is paid for: memory, tokens per second, cost, queues.

The cost of a forward (`costs`) comes from measurements (`s2t bench capacity`) or from published
specifications with assumed efficiencies (`devices`). What an answer asks of both models is
`demand`, what a deployment has is `deployment`, and `capacity` brings the two together. `queues`
simulates the same deployment event by event.
"""
