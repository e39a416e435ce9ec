"""OpenAI's requests and answers: what a JSON body asks for (body.py, messages.py), the answer's objects
(answer.py), and a batch file's lines (batch_lines.py, batch_file.py, batch.py). No HTTP, no command line."""
