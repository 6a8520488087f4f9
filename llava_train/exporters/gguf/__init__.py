"""Target `gguf`: the two files that llama.cpp, and what builds on it (Ollama, LM Studio, ...), loads.

llm.py, vision.py, tokenizer.py   what goes into the files, as metadata and a list of tensors
writing.py                        one tensor at a time into a file
modelfile.py                      Ollama's
read_back.py                      the proof: a script for a fresh process
llama_cpp.py, ask.mjs             the proof by llama.cpp itself, where it is at hand
"""
