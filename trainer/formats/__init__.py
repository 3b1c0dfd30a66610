"""File formats that several folders read or write: HTML pages and charts, headers of safetensors files, pictures with settings."""
