"""python -m uknowpan"""

from uknowpan.commands.main import main

main()
