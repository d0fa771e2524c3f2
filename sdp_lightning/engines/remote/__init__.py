"""An engine whose tokens are sampled by vLLM or SGLang servers, over HTTP."""
