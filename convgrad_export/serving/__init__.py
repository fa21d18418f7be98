"""Exported models where inference servers find them: model repositories, and starting the servers.

`signature` reads a model's tensors, `config` writes Triton's ModelConfig, `repository` lays the files out, `launch`
starts Triton or MLServer from an environment of their own. MLServer imports `mlserver_runtime` by name, so nothing is
imported here.
"""
