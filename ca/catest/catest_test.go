package catest_test

import (
	"testing"

	"github.com/entente-mesh/entente/ca/catest"
)

func TestStart(t *testing.T) {
	c := catest.Start(t, catest.Options{Verbose: testing.Verbose()})
	if c.Bundle().Empty() {
		t.Error("the bundle is empty")
	}
}
