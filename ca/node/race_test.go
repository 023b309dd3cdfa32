//go:build race

package node_test

// raced: PBKDF2 takes seconds then.
const raced = true
