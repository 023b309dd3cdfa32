package dataplaneapi

import (
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/roles"
)

// method is all that the API knows of one method.
type method struct {
	operators bool        // who can open the unix socket may call it
	right     roles.Right // lets an administrator from elsewhere call it; 0: he may not
	acts      bool        // it changes something: each call is recorded
}

// methods has a row for each method. One without a row is refused to everybody.
var methods = map[string]method{
	ententev1.DataPlane_Status_FullMethodName:  {operators: true, right: roles.See},
	ententev1.DataPlane_Drain_FullMethodName:   {operators: true, right: roles.Operate, acts: true},
	ententev1.DataPlane_Undrain_FullMethodName: {operators: true, right: roles.Operate, acts: true},
}
