"""From a folder of films to the manifests of training: `python -m mask2dit.curation [CONFIG.yaml] [key=value …]`."""
