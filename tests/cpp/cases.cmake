# Compile cases.cpp with the library: alone, it takes five times as long, because both contain the whole core.
cmake_language(EVAL CODE "
  cmake_language(DEFER CALL target_sources u2moe PRIVATE ${CMAKE_CURRENT_LIST_DIR}/cases.cpp)
  cmake_language(DEFER CALL target_include_directories u2moe PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/source)")
