package fuseserver

const overlayPrefix = "user.msb."
