"""chatforge is the contract with clients in any language: the protos of ../proto and the stubs made from them."""
