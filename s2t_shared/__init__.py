"""The Select-to-Think product: method, engine, labels, distillation. Runs without Ray, gRPC or
Redis.

Import order inside this package, kept by `tests/test_layout.py`: a module imports only from its
left.

    errors types files | config policy | text lora kv attention runtime local_selector | proposer
    scorer sequence asking engine generate | labels shards lake redis_client redis_server spool
    store drain selection_cache | metrics gate | manifest model_card registry export | trees losses
    packing checkpoints objective distill | records prompts tasks calibrate label_stats label_export

`pair` (the bundled models) and `pb` (generated wire code) stand alone.
"""
