"""Code that runs in SGLang's process."""
