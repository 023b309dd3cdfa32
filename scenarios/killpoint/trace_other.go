//go:build !linux || !(amd64 || arm64)

package killpoint

func run(Command, int) (Result, error) { return Result{}, ErrUnsupported }
