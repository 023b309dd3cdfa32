package catalog

const MaxPath = maxPath

var Unhex = unhex
