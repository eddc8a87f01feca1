def get_config():
    return {"dynamics": {"latent": "explicit"}}
