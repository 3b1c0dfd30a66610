"""File formats that several folders read or write: HTML pages, headers of safetensors files, pictures with settings."""
