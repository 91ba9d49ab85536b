"""The public edge: listens, decides, carries visitors to agents; never opens the database."""
