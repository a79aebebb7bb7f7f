"""Select-to-Think as a model of lm-evaluation-harness, in the harness's own process.

python -m services.harness run --model s2t --model_args slm=bundled,llm=bundled,mode=s2t --tasks ...
"""
