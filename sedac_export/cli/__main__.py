"""python -m sedac_export.cli: the command sedac-export."""

from sedac_export.cli import main

main()
