"""Brings the files of a checkpoint into a folder: resumed, verified, safe when many do it at once."""
