"""SGLang as a target: started or reached, one request a document."""
