"""Checkpoints of a run: written whole or not at all, verified before they are believed, the same for every engine.

    checkpoints/step-40/
        state-00000-of-00002.safetensors    what rank 0 holds of the trained weights and AdamW's moments (`shards`)
        state-00001-of-00002.safetensors    what rank 1 holds
        state.json                          step, best validation loss, what the run was (recipe, data)
        manifest.json                       sha256 of every file; written last (`manifest`)

`saving` writes them, `resuming` finds the newest that verifies, `retention` says which may go, `remote` copies them to
an object store. Random numbers need no saving: each step seeds its own.
"""
