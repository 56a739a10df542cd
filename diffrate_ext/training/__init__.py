"""What training of any kind needs: images, processes, the folder of results, a progress bar."""
