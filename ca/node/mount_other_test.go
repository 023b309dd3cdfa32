//go:build !linux

package node_test

import "errors"

func mountSmall(string, int) error { return errors.New("only on Linux") }

func unmount(string) {}
