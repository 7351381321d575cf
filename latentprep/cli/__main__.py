from latentprep.cli import main

main()
