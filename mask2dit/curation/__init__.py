"""From a folder of films to training manifests: `python -m mask2dit.curation [CONFIG.yaml] [key=value …]`."""
