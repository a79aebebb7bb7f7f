"""The gateway's HTTP side: OpenAI's API and the playground.

Knows HTTP, OpenAI's JSON and the wire's messages. What is below the transport (limits, quota,
proposers) is the gateway's, behind a `Door`.
"""
