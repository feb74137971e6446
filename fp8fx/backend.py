"""The `torch.compile` backend "fp8fx", found through the entry-point group `torch_dynamo_backends`.

    torch.compile(model, backend="fp8fx", options={"recipe": "hybrid", "inner": "inductor"})
"""
