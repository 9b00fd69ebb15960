"""Foreign formats.

nemo.py          `.nemo` ↔ model folder; nemo_folder.py: the folder's side of it
nemo_archive.py  the tar, checked member by member; nemo_config.py: its settings
nemo_weights.py  its weights in every form; nemo_bert.py: names and layouts of the tensors
"""
