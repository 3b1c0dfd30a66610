"""The routers, a file each: who chooses which tokens go to which experts. `registry.py` lists them."""
