from latenttrain.cli import main

main()
