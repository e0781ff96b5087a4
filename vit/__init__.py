"""fused-vit"""
