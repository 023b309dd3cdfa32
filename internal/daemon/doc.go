// Package daemon is what every long-running process of ours is made of: a task group, signals and exit codes, the log, the
// access log, the registry of metrics, the admin listener, listeners whose errors can be understood, what is opened or read
// again at SIGHUP or when it changes, and files that are written whole or not at all.
package daemon
