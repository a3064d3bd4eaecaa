"""A trained adapter as others can use it: a PEFT folder, a merged model or a GGUF file, each compared with what was
trained before it is handed out."""
