"""Hosts: the engines that anybit lives in. Hugging Face transformers is the default one."""
