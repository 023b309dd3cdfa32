package dataplaneapi

import ententev1 "github.com/entente-mesh/entente/api/entente/v1"

// method is all that the API knows of one method.
type method struct {
	operators bool // who can open the unix socket may call it
	acts      bool // it changes something: each call is recorded
}

func (m method) admits(c caller) bool { return c.operator && m.operators }

// methods has a row for each method. One without a row is refused to everybody.
var methods = map[string]method{
	ententev1.DataPlane_Status_FullMethodName:  {operators: true},
	ententev1.DataPlane_Drain_FullMethodName:   {operators: true, acts: true},
	ententev1.DataPlane_Undrain_FullMethodName: {operators: true, acts: true},
}
