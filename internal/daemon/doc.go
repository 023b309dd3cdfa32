// Package daemon is what every long-running process of ours is made of: a task group, signals and exit codes, the log,
// the admin listener, listeners whose errors can be understood, and files that are written whole or not at all.
package daemon
