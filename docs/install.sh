#!/usr/bin/env bash
# Makes .venv-docs: mkdocs-material, and mkdocstrings for the pages of the API.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
exec launch/extend_venv.sh .venv-docs --constraint constraints.txt mkdocs-material==9.8.2 'mkdocstrings[python]==1.0.8'
