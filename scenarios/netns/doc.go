// Package netns holds the tests of the real program over real networks: each CA node is
// a process in a network namespace of its own, and what is between them can be cut one
// way, both ways, or now and then. It needs root and the ip command.
package netns
